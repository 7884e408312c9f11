"""The lines of the log about verdicts: changes of level with their causes, and models that do not fit."""

from ..detection import ALARM, NORMAL

LEVEL_NAMES = ("normal", "watch", "alarm")  # by the numbers of detection.py
_NEWS_Q8 = 768  # surprise, 1 in 1,000 windows, from which on a new cause of an alarm that goes on is logged,
_NEWS_WINDOWS = 60  # where it has not led the explanation for that long: a decoy does not hide what comes after it


class VerdictLog:
    """log(level, text): where the lines go."""

    def __init__(self, log) -> None:
        self._log = log
        self._named: dict = {}  # (channel, feature): window in which it last led the explanation of this alarm
        self._unfit: list = []  # names of the models that do not fit
        self._steady: list = []  # of which channels the log has reported last that they are steady

    def observe(self, verdict, agent) -> None:
        """A window has been scored."""
        self._log_fit(agent)
        self._log_steady(agent)
        if verdict.changed:
            self._named = {}
        lead = getattr(verdict, "channel", 0)
        leading = [(lead, index) for index, _, _ in verdict.explain(1)] if verdict.level == ALARM else []
        new_cause = (
            bool(leading)
            and verdict.surprise_q8 >= _NEWS_Q8
            and self._windows_since(leading[0], agent) >= _NEWS_WINDOWS
        )
        for index in leading:
            self._named[index] = agent.windows
        if verdict.changed or new_cause:
            columns = agent.columns
            causes = ["%s %+.1f sd (%d %%)" % (columns[i], z / 16, share) for i, z, share in verdict.explain(3)]
            text = "%s%s%s: score %.2f, 1 in 10^%.1f windows; %s" % (
                LEVEL_NAMES[verdict.level],
                "" if verdict.changed else " goes on",
                " in " + agent.channel_names[lead - 1] if lead else "",
                verdict.score_q8 / 256,
                verdict.surprise_q8 / 256,
                ", ".join(causes),
            )
            self._log("info" if verdict.level == NORMAL else "warning", text)

    def _log_fit(self, agent) -> None:
        unfit = [each.scorer.meta.name + _of_channel(each) for each in agent.channels if each.scorer.verdict.unfit]
        for name in unfit:
            if name not in self._unfit:
                text = "model %s does not fit this device: nothing can alarm while it learns again; if this goes on,"
                self._log("warning", text % name + " train a model on the device's own recordings (stonechat train)")
        for name in self._unfit:
            if name not in unfit:
                self._log("info", "model %s fits now" % name)
        self._unfit = unfit

    def _log_steady(self, agent) -> None:
        steady = [_of_channel(each) for each in agent.channels if getattr(each.scorer, "steady", False)]
        for name in steady:
            if name not in self._steady:
                text = "changed, and steady%s: an hour of alarm at a constant level; what is new on top still alarms."
                self._log("warning", text % name + " Answer with the command `was-normal` or `calibrate`")
        for name in self._steady:
            if name not in steady:
                self._log("info", "steady no longer%s: it is back, or an operator has answered" % name)
        self._steady = steady

    def _windows_since(self, cause: tuple, agent) -> int:
        """cause: (channel, feature) -> windows since it led an alarm's explanation; _NEWS_WINDOWS where it has not in
        this alarm."""
        if cause not in self._named:
            return _NEWS_WINDOWS
        return int(agent.windows - self._named[cause])


def _of_channel(channel) -> str:
    """For a message: of which channel beside the device's own."""
    return " of " + channel.name if hasattr(channel, "name") else ""
