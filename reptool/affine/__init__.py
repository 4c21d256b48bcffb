"""The algebra of affine operators; it knows no graph, no ``nn.Module`` and no file."""
