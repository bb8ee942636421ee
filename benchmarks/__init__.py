"""The five-fold benchmark: trainings, fairness, scores, statistics, report."""
