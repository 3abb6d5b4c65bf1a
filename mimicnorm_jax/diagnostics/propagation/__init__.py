"""How moments and perturbations travel through the layers."""
