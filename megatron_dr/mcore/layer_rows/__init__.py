"""The layer path: rows are samples, their gradients weighed inside the layers' backward."""
