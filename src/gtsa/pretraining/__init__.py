"""gtsa pretrain, and what goes before and after it."""
