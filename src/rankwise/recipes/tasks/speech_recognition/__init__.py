"""The task of speech recognition. `rankwise.recipes.tasks.speech_recognition.task` has the members of `Task`."""
