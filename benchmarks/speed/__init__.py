"""What a step costs on a CPU, ours beside other optimizers: ``make bench``."""
