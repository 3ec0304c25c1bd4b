"""What the paper is about: TCR, DAQ and PAR, and what this project adds to them."""
