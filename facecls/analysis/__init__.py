"""Analysis of predictions: scores, groups, calibration, comparisons, suspect labels, explanations."""
