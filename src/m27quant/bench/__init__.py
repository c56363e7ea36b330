"""How fast a checkpoint answers, with a drafter and without: the table of the drafters' cards."""
