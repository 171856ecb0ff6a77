"""Stock checkpoints that become FA models: reading, translating, converting and writing them."""
