"""Make videos from prompts, images and videos: MP4 files and a contact sheet.

`--model` takes a run's or a model's folder, else one is trained. Images and videos come with a prompt, and
`--sample.num-frames` counts their frames too:

    image to video       --sample.given.begin photo.png
    first, last image    --sample.given.begin first.png --sample.given.end last.png
    go on                --sample.given.begin clip.mp4
    what came before     --sample.given.end clip.mp4
    from one to another  --sample.given.begin one.mp4 --sample.given.end other.mp4
    endless loop         --sample.given.loop clip.mp4
    edit                 --sample.given.edit clip.mp4 --sample.given.strength 0.6
    long, in windows     --sample.num-frames 161 --sample.generate.window-frames 33
"""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.samples, __doc__, "look at {uri}/contact_sheet.png")
