"""Evaluation of codecs with objective metrics, and reports of the results.

A compared codec is one file in `codecs/`, a metric that needs a trained model is one file in `model_metrics/`, and any
other metric is a function and a row of `METRICS` in `metrics.py`. Other packages register theirs with
`register_codec`, `register_model_metric` and `register_metric`; see `plugins.py`.
"""
