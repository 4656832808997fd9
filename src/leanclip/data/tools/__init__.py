"""`leanclip data check`: what is in a data set, looked at before training."""
