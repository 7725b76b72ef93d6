"""The paper's experiments, one file each, in three steps that can each be repeated: predict, judge, score."""
