"""Ray as a driver uses it: started or joined, watched, and cleaned up after.

Begin with `session.RaySession.open`. It starts a local Ray (`local_ray`, with its files in `ray_folder`), or joins a
cluster by address: `access` finds address and token, and `probe` asks the head whether it answers, quickly. `ray_watch`
notices that Ray has died, long before Ray's client does.
"""
