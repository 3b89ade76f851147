"""Evaluate codecs with objective metrics, and report the results.

Each codec that can be compared has a module in `codecs/`, and each metric that needs a trained model has a module in
`model_metrics/`. Any other metric is a function in `metrics.py` with an entry in `METRICS`. Other packages add codecs
and metrics with `register_codec`, `register_model_metric` and `register_metric`; see `plugins.py`.
"""
