"""Operations on sparse tensors, one stem a file."""
