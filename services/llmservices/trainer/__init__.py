"""Trains: optimiser steps over batches that the data service makes, checkpoints in the store."""
