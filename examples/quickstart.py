"""Wan2.1 with temporal sparse attention. Needs a CUDA GPU, and `pip install '.[diffusers]' imageio-ffmpeg`."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")

pipe.transformer = torch.compile(pipe.transformer, backend="liteattention")

video = pipe("A red fox trots through fresh snow, cinematic", height=480, width=832, num_frames=81).frames[0]
export_to_video(video, "fox.mp4", fps=16)
