"""Adversarial distillation (ALDK): discriminator, training step, stored teacher deformations."""
