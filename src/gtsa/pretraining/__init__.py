"""gtsa pretrain, with its plan and verdict; gtsa check and gtsa preview."""
