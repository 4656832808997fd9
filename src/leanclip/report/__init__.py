"""Evaluation results as text, pictures and HTML pages."""
