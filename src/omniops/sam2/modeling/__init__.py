"""SAM 2's network: image encoder, memory, prompt encoder and mask decoder, for images and videos alike.

Modules and parameters have the names of Meta's checkpoints, which so load as they are. Written from the papers: SAM 2
(Ravi et al., 2024, https://arxiv.org/abs/2408.00714), SAM (Kirillov et al., 2023, https://arxiv.org/abs/2304.02643),
Hiera (Ryali et al., 2023, https://arxiv.org/abs/2306.00989).
"""
