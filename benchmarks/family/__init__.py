"""The methods of the family beside each other: one trainer, one order of the data, equal samples and equal compute."""
