"""Ray as a driver uses it: started or joined, watched, and cleaned up after.

Begin with `session.RaySession.open`: it starts a Ray of our own (`local_ray`, with its files in `ray_folder`) or joins
one by address (`access`, which finds address and token; `probe`, which asks the head quickly whether it answers).
`ray_watch` notices that Ray has died, long before Ray's client does.
"""
