"""What importance, selection and a training step of a model of any size will take: predicted."""

from __future__ import annotations

from piece_ops.predict.devices import NAMES, Device, device
from piece_ops.predict.models import CONFIGS, Model, read_model
from piece_ops.predict.phases import Phase, Plan, Prediction
from piece_ops.predict.table import report

__all__ = [
    "CONFIGS",
    "NAMES",
    "Device",
    "Model",
    "Phase",
    "Plan",
    "Prediction",
    "device",
    "read_model",
    "report",
]
