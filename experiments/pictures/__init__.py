"""Drawing and describing pictures: what the codec keeps, what the reader reads, what is drawn."""
