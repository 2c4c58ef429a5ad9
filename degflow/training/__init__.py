"""Training on Accelerate, and the jobs whose results are degraders.

rae, lfm        the two stages: the residual autoencoder, the latent flow
released        the authors' weight files -> a degrader file
loop            `fit`, the loop of every training
settings        its keys, `fit.*`
checkpoints     checkpoints/step-N.pt
processes       what the processes of a training tell each other
stopping        SIGTERM and SIGUSR1: save and leave
logs            TensorBoard
"""
