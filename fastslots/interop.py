"""The published checkpoints: load a state_dict of the authors' program, and give one back."""

from fastslots.models.weights import load_official, official_name, read_state, to_official

__all__ = ["load_official", "official_name", "read_state", "to_official"]
