"""Around training: schedules, exports, pictures."""
