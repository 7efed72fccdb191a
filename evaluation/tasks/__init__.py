"""Evaluation tasks in lmms-eval's YAML form, read by the native runner and by lmms-eval."""
