"""The demo page: held-out images, their reconstructions, their captions, and mixes."""
