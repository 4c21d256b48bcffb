"""How implementations name the tensors of the zoo's networks: one file a family."""
