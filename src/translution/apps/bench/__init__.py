"""Speed and memory of the operators, as ratios within one process."""
