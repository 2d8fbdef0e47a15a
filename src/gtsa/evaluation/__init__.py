"""What are features worth: in numbers, as vectors, by eye."""
