"""From a dense model to experts: calibrate, select, slice, refit. Pure functions on parameter trees."""
