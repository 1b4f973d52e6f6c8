"""Where notices may be sent, how they are signed, and what the settings must be."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.notify import NotifyError, Settings, is_public, signature
from hpo.study.checks import CheckError, web_address
from hpo.study.config import EVENTS, ConfigError, NotifySection, from_dict, to_dict

PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "192.0.2.1",
    "192.168.1.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1",
    "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:1::",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]


@pytest.mark.parametrize("address", PRIVATE)
def test_nothing_is_sent_to_an_address_that_is_not_of_the_open_internet(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_the_open_internet_is(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_an_ipv6_address_that_holds_an_ipv4_address_goes_by_that(address: ipaddress.IPv4Address) -> None:
    holders = [(0xFFFF << 32) + int(address), (0x64FF9B << 96) + int(address), (0x2002 << 112) + (int(address) << 80)]
    for holder in holders:
        assert is_public(ipaddress.IPv6Address(holder)) == is_public(address)


def test_a_signature_is_what_openssl_makes() -> None:
    """printf '1700000000.{}' | openssl dgst -sha256 -hmac 0123456789abcdef"""
    known = "e4f8e2ecae2295b2ddb2f0b5584c8275e226c0ebe9b3b819e70156bb67122e3e"
    assert signature(b"0123456789abcdef", 1700000000, b"{}") == f"t=1700000000,v1={known}"
    assert signature(b"0123456789abcdef", 1700000001, b"{}").split("v1=")[1] != known


class TestSettings:
    @pytest.fixture(autouse=True)
    def unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HPO_NOTIFY_SECRET", "HPO_NOTIFY_SECRET_FILE", "HPO_NOTIFY_PRIVATE"):
            monkeypatch.delenv(name, raising=False)

    def test_are_none_without_a_secret(self) -> None:
        assert Settings.of_environment() == Settings(None, private=False)

    def test_take_the_secret_from_the_environment_or_a_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text("of a file, long enough\n")
        monkeypatch.setenv("HPO_NOTIFY_SECRET_FILE", str(tmp_path / "secret"))
        monkeypatch.setenv("HPO_NOTIFY_PRIVATE", "1")
        assert Settings.of_environment() == Settings(b"of a file, long enough", private=True)
        monkeypatch.setenv("HPO_NOTIFY_SECRET", "of the environment")
        assert Settings.of_environment().secret == b"of the environment"

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("HPO_NOTIFY_SECRET", "short", "HPO_NOTIFY_SECRET must have at least 16 characters, got 5; `openssl rand"),
            ("HPO_NOTIFY_SECRET_FILE", "/nowhere", "HPO_NOTIFY_SECRET_FILE /nowhere cannot be read"),
            ("HPO_NOTIFY_PRIVATE", "yes", "HPO_NOTIFY_PRIVATE must be 1, .* or 0, got 'yes'"),
        ],
    )
    def test_that_break_a_rule_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(NotifyError, match=expected):
            Settings.of_environment()


class TestStudyFile:
    @pytest.mark.parametrize(
        "url",
        ["https://example.org", "http://127.0.0.1:80/x?y=1", "https://[::1]:8/", "https://hooks.example.org/T0/B1/c@d"],
    )
    def test_takes_an_address(self, url: str) -> None:
        assert web_address(url) == url

    @pytest.mark.parametrize(
        "url",
        ["", 3, "example.org", "ftp://example.org", "https://", "https://me:secret@example.org", "https://me@example.org",
         "https://example.org/#top", "https://example.org/a b", "https://example.org\\@evil.example/", "https://exämple.org",
         "https://example.org\n", "https://example.org:123456/", f"https://example.org/{'x' * 2000}"],
    )  # fmt: skip
    def test_refuses_what_is_none(self, url: object) -> None:
        with pytest.raises(CheckError, match="must be an http:// or https:// URL"):
            web_address(url)

    def test_names_address_and_events(self) -> None:
        tables = {"data": {"train": "a.npz"}, "notify": {"url": "https://example.org"}}
        assert from_dict(tables).notify == NotifySection("https://example.org", EVENTS)
        tables["notify"]["on"] = ["end", "promotion"]  # type: ignore[assignment]
        assert from_dict(tables).notify.on == ("end", "promotion")

    @pytest.mark.parametrize(
        ("notify", "expected"),
        [
            ({"on": ["end"]}, "notify.url must name the address that is told"),
            (
                {"url": "https://a", "on": []},
                'notify.on must be a list of at least one of "end", "failure"',
            ),
            ({"url": "https://a", "on": ["end", "end"]}, "each once, got"),
            ({"url": "https://a", "on": ["begin"]}, "notify.on must be a list"),
            ({"url": "https://a", "on": "end"}, "notify.on must be a list"),
            ({"url": "https://a", "secret": "x"}, "unknown key notify.secret; known are url, on"),
        ],
    )
    def test_of_another_form_is_refused(self, notify: dict[str, object], expected: str) -> None:
        with pytest.raises(ConfigError, match=expected):
            from_dict({"data": {"train": "a.npz"}, "notify": notify})

    def test_keeps_the_address_out_of_the_plan_which_models_carry(self) -> None:
        config = from_dict({"data": {"train": "a.npz"}, "notify": {"url": "https://example.org/secret"}})
        assert "secret" not in repr(to_dict(config))
