"""Plan before you rent: compile a run's real steps for a TPU topology without a TPU, and say what they need."""
