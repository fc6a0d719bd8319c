"""The main job: mixers trained and tested on digits that move."""
