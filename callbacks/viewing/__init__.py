"""The viewer: a scene in the browser, from settings and a camera to a picture and back."""
