"""Adversarial distillation (ALDK): discriminator, training step, teacher deformations on disk."""
