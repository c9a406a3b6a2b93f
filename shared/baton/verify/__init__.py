"""Does the ledger tell the truth? Known delays go in at known places, and what the ledger says of them is compared."""
