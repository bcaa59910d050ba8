"""Trainers for nnU-Net's `-tr`, one flat file each: point nnUNet_extTrainer at this folder (`nnssl trainers
--path`)."""
