"""Captions by a teacher: a strong vision-language model describes the images that stage 2 learns from."""
