"""Checkpoints: read safely, recognised from keys and shapes, fused by recipes, written whole or not at all."""
