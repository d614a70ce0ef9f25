"""Training: the LightningModule, its optimizer and checkpoints, one run and many."""
