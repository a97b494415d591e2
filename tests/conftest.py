"""Test helpers lie in this folder (`from tiny_models import tiny_model`); no test may reach a model hub."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
