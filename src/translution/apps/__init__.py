"""The applications: data, training, experiments, the demo, benchmarks, and the command line."""
