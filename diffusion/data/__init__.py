"""From a folder of pictures to batches; every choice on the way is a keyed draw."""
