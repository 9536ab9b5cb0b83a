"""List the papers of the methods, in BibTeX."""

GUIDANCE_PAPER = """@article{ho2022classifier,
  title   = {Classifier-Free Diffusion Guidance},
  author  = {Ho, Jonathan and Salimans, Tim},
  journal = {arXiv:2207.12598},
  year    = {2022}
}"""
VARIATIONAL_PAPER = """@article{kingma2021variational,
  title   = {Variational Diffusion Models},
  author  = {Kingma, Diederik P. and Salimans, Tim and Poole, Ben and Ho, Jonathan},
  journal = {arXiv:2107.00630},
  year    = {2021}
}"""
GAN_PAPER = """@inproceedings{xiao2022tackling,
  title     = {Tackling the Generative Learning Trilemma with Denoising Diffusion {GANs}},
  author    = {Xiao, Zhisheng and Kreis, Karsten and Vahdat, Arash},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""
CLASSIFIER_PAPER = """@inproceedings{dhariwal2021diffusion,
  title     = {Diffusion Models Beat {GANs} on Image Synthesis},
  author    = {Dhariwal, Prafulla and Nichol, Alexander},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}"""
DISTILLATION_PAPER = """@inproceedings{meng2023distillation,
  title     = {On Distillation of Guided Diffusion Models},
  author    = {Meng, Chenlin and Rombach, Robin and Gao, Ruiqi and Kingma, Diederik P. and Ermon, Stefano and Ho, \
Jonathan and Salimans, Tim},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023}
}"""
ONE_PASS_PAPER = """@article{chen2025visual,
  title   = {Visual Generation Without Guidance},
  author  = {Chen, Huayu and Jiang, Kai and Zheng, Kaiwen and Chen, Jianfei and Su, Hang and Zhu, Jun},
  journal = {arXiv:2501.15420},
  year    = {2025}
}"""
