"""The comparison of mixers that are trained and tested on moving digits."""
