"""Looks into models: every step from a token to its contextual output, with its numbers."""

from keras_transformer.inspection.traces import Step, Trace, Verification, attention_maps, trace

__all__ = ["Step", "Trace", "Verification", "attention_maps", "trace"]
