"""What changes the model or its optimizer: adapters, the value head, compressed moments."""
