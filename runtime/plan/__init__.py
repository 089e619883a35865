"""`trimtab plan`: what a model needs of each rank's memory and of the network, before anything starts."""
